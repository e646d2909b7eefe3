"""Reading configuration strictly, and explaining in one line what is wrong with it."""
