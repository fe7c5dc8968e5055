"""What tests share: tiny models, caches and SAEs, damages, writers that die, definitions in float64."""
