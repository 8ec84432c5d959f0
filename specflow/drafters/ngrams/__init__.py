"""n-gram storages, what they count, their files, and the drafters that read them."""
