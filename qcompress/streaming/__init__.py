"""Work with an opened model one block at a time: write codes, evaluate losses."""
