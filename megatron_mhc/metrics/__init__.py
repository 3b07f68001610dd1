"""What a run shows of its streams: formulas, how a step is recorded, when, and the guard."""
