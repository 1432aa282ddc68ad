"""Running a function under a dispatch mode that records a tape of its ops."""
