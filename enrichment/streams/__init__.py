"""What rows of the slot mean: the plan of one stream, and more than one stream in a slot."""
