"""Episodes, as a policy and a simulator make them, and the decisions in them."""
