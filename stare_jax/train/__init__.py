"""The three learners: imitation, preference, interaction."""
