"""The commands of `python -m megatron_mhc`: doctor, plot, convert."""
