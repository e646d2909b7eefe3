"""What a training step of each method costs, against the least that it can cost and against PEFT."""
