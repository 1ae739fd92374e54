"""What a run says of itself: progress, stages, state on storage, its last line. Imports `config`, `store` and the ground."""
