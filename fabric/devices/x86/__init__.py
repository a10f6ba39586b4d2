"""x86: the 8259 pair, the IOAPIC, local APICs, the PIT, Hyper-V's SynIC."""
