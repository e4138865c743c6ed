"""Files wherever they are: local folders, URLs, object stores, the Hugging Face hub."""
