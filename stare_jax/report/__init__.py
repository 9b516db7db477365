"""Pages and pictures of measurements."""
