"""Home of what runs studies on many machines; nothing that a study is made of may import it."""
