"""What the commands show: one command a file, its functions give tables and print nothing."""
