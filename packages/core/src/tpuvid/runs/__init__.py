"""One video or many: the stages run, watched, kept and written."""
