"""What a run reports: progress, time by stage, its state on storage, its last line. Imports `config`, `store`, the ground."""
