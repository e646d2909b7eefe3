"""What is meant by the names of other tools, and by settings in the wrong section."""
