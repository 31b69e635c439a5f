"""Pure numerics of PPO-RLHF: no configuration, no rank, no input or output."""
