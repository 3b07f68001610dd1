"""What mHC costs by formula: FLOPs, parameters, messages, and the memory of recompute."""
