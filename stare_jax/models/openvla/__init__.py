"""OpenVLA: presets, network, policy, sharding."""
