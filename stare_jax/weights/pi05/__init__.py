"""pi0.5's checkpoints: openpi's, its PyTorch port's, lerobot's, and PaliGemma's npz."""
