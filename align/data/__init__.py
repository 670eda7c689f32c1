"""What is trained and evaluated on: data cards, their examples, and the token ids of conversations."""
