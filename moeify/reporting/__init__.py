"""The parts of the report page: what is read, what is concluded from it, and how it is drawn."""
