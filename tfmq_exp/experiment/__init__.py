"""A run: configuration to objects, stages through the store, results to files. Hydra and wandb live only here."""
