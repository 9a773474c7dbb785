"""Scripts that write the tables and draw the pictures of the documentation."""
