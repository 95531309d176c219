"""APIs over HTTP, by their manifests. Start at manifest.py; a read begins in reading.py."""
