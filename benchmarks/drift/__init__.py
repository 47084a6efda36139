"""What a state in bfloat16 would lose over a long history."""
