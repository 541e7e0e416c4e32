"""What a post-training quantization method is: a record of choices, and the order of work that all methods share."""
