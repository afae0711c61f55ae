"""What shall be done: plans, programs and their laws, in plain numbers and the standard library only."""
