"""ManiSkill's simulators; the only place with PyTorch and SAPIEN."""
