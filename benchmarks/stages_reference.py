"""Annotation of pick-place trajectories in NumPy and in torch, for `benchmarks/stages.py` to compare with.

It is written from the formulas and shares only the task's parameters `p` with the library. NumPy annotates one
trajectory `[T, ...]` at a time, torch all of them `[B, T, ...]` at once. Both loop over time only where a step needs
another one. Potentials are the paper's own and count as 0 at a termination.
"""

import functools

import numpy as np
import torch

NUM_STAGES = 4


# ------------------------------------------------------------------------------------------------------------ NumPy


def annotate_numpy(p, s, valid, value, gamma, gae_lambda):
    """Label `[T]`, cost `[K]`, potential `[T]`, shaped reward and advantage `[N]` of one trajectory; 0 on padding."""
    reach = _length(s.tcp_pos - s.grasp_pos)
    label = _label_numpy(p, s, valid, reach)
    cost = _cost_numpy(p, s, reach, [np.flatnonzero((label == k) & valid) for k in range(NUM_STAGES)])
    potential = np.where(valid, _potential_numpy(p, s, reach, label), 0.0)
    shaped, advantage = _advantage_numpy(s.success, valid, value, potential, gamma, gae_lambda)
    return np.where(valid, label, 0), cost, potential, shaped, advantage


_length = functools.partial(np.linalg.norm, axis=-1)


def _label_numpy(p, s, valid, reach):
    height = s.obj_pos[:, 2] - s.support_z
    events = [
        s.is_contact | (reach < p.delta_reach),
        s.is_grasped & (height > p.delta_lift),
        _length((s.obj_pos - s.goal_pos)[:, :2]) < p.delta_goal,
        s.success,
    ]
    label, done = np.zeros(len(valid), np.int32), 0
    for t in range(len(valid)):
        if valid[t]:
            while done < NUM_STAGES and events[done][t]:
                done += 1
            if s.success[t]:
                done = NUM_STAGES
        label[t] = min(done, NUM_STAGES - 1)
    return label


def _cost_numpy(p, s, reach, steps):
    cost = np.zeros(NUM_STAGES, np.float32)
    if len(steps[0]):
        cost[0] = reach[steps[0]].mean()
    if len(steps[1]):
        in_hand = _to_frame_numpy(s.tcp_quat, s.obj_pos - s.tcp_pos)
        slid = _length(np.diff(in_hand, axis=0)) > p.slip_tol
        slip = np.append(False, s.is_grasped[:-1] & (~s.is_grasped[1:] | slid))
        cost[1] = (p.alpha_align * reach + p.alpha_slip * slip)[steps[1]].mean()
    if len(steps[2]):
        start, point, goal = s.obj_pos[steps[2][0]], s.obj_pos[steps[2]], s.goal_pos[steps[2]]
        corner = np.concatenate([goal[:, :2], np.maximum(start[2], goal[:, 2:])], axis=1)
        first, second = _segment_numpy(point, start, corner), _segment_numpy(point, corner, goal)
        cost[2] = np.minimum(first, second).mean()
    if len(steps[3]):
        moved = np.append(0.0, _length(np.diff(s.obj_pos, axis=0)))
        cost[3] = p.lambda_stab * moved[steps[3][-p.stable_steps :]].mean()
    return cost


def _potential_numpy(p, s, reach, label):
    def sigmoid(x):
        return 1.0 / (1.0 + np.exp(-x))

    held, lasting = 0, np.zeros(len(label), np.float32)
    for t, is_grasped in enumerate(s.is_grasped):
        held = held + 1 if is_grasped else 0
        lasting[t] = held
    to_goal = _length(s.obj_pos - s.goal_pos)
    by_stage = [
        sigmoid(1 - reach / p.d_reach),
        p.beta1 * s.is_grasped + p.beta2 * np.tanh(lasting / p.tau),
        sigmoid(1 - to_goal / p.d_trans) + p.beta3 * s.is_grasped,
        sigmoid(1 - to_goal / p.d_place) + p.beta4 * np.sum(s.obj_quat * s.goal_quat, axis=-1) ** 2,
    ]
    return np.choose(label, by_stage)


def _advantage_numpy(success, valid, value, potential, gamma, gae_lambda):
    shaped, advantage = np.zeros((2, len(valid) - 1), np.float32)
    following = 0.0
    for t in reversed(range(int(valid.sum()) - 1)):
        discount = 0.0 if success[t + 1] else gamma
        shaped[t] = float(success[t + 1]) + discount * potential[t + 1] - potential[t]
        following = shaped[t] + discount * value[t + 1] - value[t] + discount * gae_lambda * following
        advantage[t] = following
    return shaped, advantage


def _to_frame_numpy(quat, vector):
    w, x, y, z = quat.T
    transposed = [
        [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)],
        [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)],
        [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.einsum("ijt,tj->ti", np.array(transposed), vector)


def _segment_numpy(point, start, end):
    along = end - start
    square = np.maximum(np.sum(along**2, axis=-1, keepdims=True), 1e-12)
    fraction = np.clip(np.sum((point - start) * along, axis=-1, keepdims=True) / square, 0.0, 1.0)
    return _length(point - start - fraction * along)


# ------------------------------------------------------------------------------------------------------------ torch


@torch.no_grad()
def annotate_torch(p, s, valid, value, gamma, gae_lambda):
    """Label `[B, T]`, cost `[B, K]`, potential `[B, T]`, shaped reward and advantage `[B, N]`; 0 on padding."""
    reach = _norm(s.tcp_pos - s.grasp_pos)
    label = _label_torch(p, s, valid, reach)
    stage = torch.arange(NUM_STAGES, device=valid.device)[:, None]
    cost = _cost_torch(p, s, reach, (label[:, None] == stage) & valid[:, None])
    potential = _potential_torch(p, s, reach, label) * valid
    shaped, advantage = _advantage_torch(s.success, valid, value, potential, gamma, gae_lambda)
    return torch.where(valid, label, 0), cost, potential, shaped, advantage


_norm = functools.partial(torch.linalg.vector_norm, dim=-1)


def _label_torch(p, s, valid, reach):
    events = [
        s.is_contact | (reach < p.delta_reach),
        s.is_grasped & (s.obj_pos[..., 2] - s.support_z > p.delta_lift),
        _norm((s.obj_pos - s.goal_pos)[..., :2]) < p.delta_goal,
        s.success,
    ]
    events = torch.stack(events, dim=-1) | s.success[..., None]
    stage = torch.arange(NUM_STAGES, device=valid.device)
    done, labels = torch.zeros(len(valid), dtype=torch.long, device=valid.device), []
    for t in range(valid.shape[1]):
        ended = (events[:, t] | (stage < done[:, None])).long().cumprod(dim=1).sum(dim=1)
        done = torch.where(valid[:, t], ended, done)
        labels.append(done.clamp(max=NUM_STAGES - 1))
    return torch.stack(labels, dim=1)


def _cost_torch(p, s, reach, mask):
    def mean(x, m):
        return (x * m).sum(dim=1) / m.sum(dim=1).clamp(min=1)

    in_hand = _to_frame_torch(s.tcp_quat, s.obj_pos - s.tcp_pos)
    slid = _norm(in_hand.diff(dim=1)) > p.slip_tol
    slip = torch.nn.functional.pad(s.is_grasped[:, :-1] & (~s.is_grasped[:, 1:] | slid), (1, 0))
    rows = torch.arange(len(mask), device=mask.device)
    start = s.obj_pos[rows, mask[:, 2].int().argmax(dim=1)][:, None].expand_as(s.obj_pos)
    corner = torch.cat([s.goal_pos[..., :2], torch.maximum(start[..., 2:], s.goal_pos[..., 2:])], dim=-1)
    path = torch.minimum(_segment_torch(s.obj_pos, start, corner), _segment_torch(s.obj_pos, corner, s.goal_pos))
    placing = mask[:, 3]
    last = placing & (placing.sum(dim=1, keepdim=True) - placing.cumsum(dim=1) < p.stable_steps)
    moved = torch.nn.functional.pad(_norm(s.obj_pos.diff(dim=1)), (1, 0))
    cost = [
        mean(reach, mask[:, 0]),
        mean(p.alpha_align * reach + p.alpha_slip * slip, mask[:, 1]),
        mean(path, mask[:, 2]),
        p.lambda_stab * mean(moved, last),
    ]
    return torch.stack(cost, dim=-1)


def _potential_torch(p, s, reach, label):
    held, lasting = torch.zeros(len(label), device=label.device), []
    for t in range(label.shape[1]):
        held = torch.where(s.is_grasped[:, t], held + 1, 0)
        lasting.append(held)
    to_goal = _norm(s.obj_pos - s.goal_pos)
    by_stage = [
        torch.sigmoid(1 - reach / p.d_reach),
        p.beta1 * s.is_grasped + p.beta2 * torch.tanh(torch.stack(lasting, dim=1) / p.tau),
        torch.sigmoid(1 - to_goal / p.d_trans) + p.beta3 * s.is_grasped,
        torch.sigmoid(1 - to_goal / p.d_place) + p.beta4 * (s.obj_quat * s.goal_quat).sum(dim=-1) ** 2,
    ]
    return torch.stack(by_stage, dim=-1).gather(-1, label[..., None])[..., 0]


def _advantage_torch(success, valid, value, potential, gamma, gae_lambda):
    is_action = valid[:, 1:]
    reward = (success[:, 1:] & is_action).float()
    discount = gamma * (1 - reward)
    shaped = (reward + discount * potential[:, 1:] - potential[:, :-1]) * is_action
    delta = (shaped + discount * value[:, 1:] - value[:, :-1]) * is_action
    following, advantages = torch.zeros(len(valid), device=valid.device), []
    for t in reversed(range(delta.shape[1])):
        following = delta[:, t] + gae_lambda * discount[:, t] * following
        advantages.append(following)
    return shaped, torch.stack(advantages[::-1], dim=1)


def _to_frame_torch(quat, vector):
    real, imaginary = quat[..., :1], -quat[..., 1:]
    cross = torch.linalg.cross(imaginary, vector)
    return vector + 2 * (real * cross + torch.linalg.cross(imaginary, cross))


def _segment_torch(point, start, end):
    along = end - start
    square = (along**2).sum(dim=-1, keepdim=True).clamp(min=1e-12)
    fraction = (((point - start) * along).sum(dim=-1, keepdim=True) / square).clamp(0, 1)
    return _norm(point - start - fraction * along)
