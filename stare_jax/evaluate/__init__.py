"""Numbers about policies: success rates and intervals, stage by stage."""
