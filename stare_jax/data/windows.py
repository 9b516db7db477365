"""Windows of consecutive actions, for policies that predict several at a time."""

import numpy as np

from stare_jax.data.reader import Dataset


def window_indices(t: np.ndarray, length: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the actions that follow a state; beyond an episode's end its last action is repeated.

    Args:
        t: int `[...]`, number of the state in its episode.
        length: int `[...]`, number of the episode's actions.
        window: H.

    Returns:
        Indices int `[..., H]` in [0, length), and bool `[..., H]`, False where an action is repeated.
    """
    wanted = np.asarray(t)[..., None] + np.arange(window)
    last = np.maximum(np.asarray(length) - 1, 0)[..., None]
    return np.minimum(wanted, last), wanted <= last


class ActionWindows:
    """All actions of a data set in memory; no image is decoded for them."""

    def __init__(self, dataset: Dataset, window: int):
        actions = [dataset.episode_record(i)["action"] for i in range(dataset.num_episodes)]
        self._actions = np.concatenate(actions)
        self._length = np.array([len(action) for action in actions])
        self._first_action = np.cumsum(self._length) - self._length
        self._first_frame, self._window = dataset.first_frame, window

    def __call__(self, frame: np.ndarray, episode: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns windows float32 `[F, H, A]` from frames int `[F]` of episodes `[F]`, and bool `[F, H]`, see above."""
        t = frame - self._first_frame[episode]
        index, is_inside = window_indices(t, self._length[episode], self._window)
        return self._actions[self._first_action[episode][:, None] + index], is_inside
