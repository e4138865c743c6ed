"""Records of a batch of predictions, their journal on disk, and the contact sheet that shows them."""
