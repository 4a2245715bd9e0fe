"""What tools/complete_masks.py does, step by step."""
