"""What happens in each step of any model: plan, schedules, kept weights, checkpoints."""
