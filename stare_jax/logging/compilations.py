"""The number of programs compiled so far: a loop whose shapes are static compiles nothing after its first turn."""

_EVENT = "/jax/core/compile/backend_compile_duration"
_num_compilations = 0
_is_counting = False


def num_compilations() -> int:
    """Returns the number of XLA programs that this process has compiled, or read from the compilation cache, since the
    first call."""
    global _is_counting
    if not _is_counting:
        import jax  # here, so that a command that prints a line need not wait for it

        jax.monitoring.register_event_duration_secs_listener(_count)
        _is_counting = True
    return _num_compilations


def _count(event: str, duration: float, **details: object) -> None:
    global _num_compilations
    del duration, details
    _num_compilations += event == _EVENT
