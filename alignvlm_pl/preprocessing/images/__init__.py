"""What an image is given as, and the bytes of its file that matter."""
