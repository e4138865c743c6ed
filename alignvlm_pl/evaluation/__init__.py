"""Records of a batch of predictions, and the contact sheet that shows them."""
