"""How a layer of Megatron reads and writes n streams: sites, parameters, recompute."""
