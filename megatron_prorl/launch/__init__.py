"""Starting the trainer ranks."""
