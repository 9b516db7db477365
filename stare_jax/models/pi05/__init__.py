"""pi0.5: presets, network, policy, prompt, sharding."""
