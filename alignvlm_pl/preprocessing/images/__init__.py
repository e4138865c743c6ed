"""What an image is given as, the bytes of its file that matter, and the part of a page that has content."""
