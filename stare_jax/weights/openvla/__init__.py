"""OpenVLA's checkpoints in Hugging Face's form."""
