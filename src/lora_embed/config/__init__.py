"""What users write, checked as it is read, and what tables say, read with suspicion. Imports `store` and the ground."""
