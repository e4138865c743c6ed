"""The journal of predictions on disk, and the contact sheet that shows them."""
