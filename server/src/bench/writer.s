# A guest for QEMU that rewrites a working set at a rate: what the built-in workload is for our own guests.
# Multiboot, 32 bits, no paging. A timer ticks 100 times a second, each tick owes so many pages, the processor
# halts between. Every page is rewritten in full, with another value in every turn through the working set.
#
#   as --32 -o writer.o writer.s && ld -m elf_i386 --oformat binary -Ttext 0x100000 -o writer.bin writer.o
#
# writer.bin beside this is what that makes; a test compares them. The words at `first` are set by whoever loads it.
.text
.globl _start
_start:
header: .long 0x1badb002, 0x00010000, -(0x1badb002 + 0x00010000)
        .long header, header, end, end, entry
first:  .long 0                 # offset 32: first byte of the working set
last:   .long 0                 # 36: the byte after its last
owed:   .long 0                 # 40: pages of one tick
done:   .long 0                 # 44: pages rewritten so far
due:    .long 0                 # pages to rewrite now
entry:  cli
        cld
        lgdt gdtr
        ljmp $8, $flat
flat:   mov $16, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        mov $0x90000, %esp
        # One gate, for the timer: vector 32. The table lies at 0x80000.
        movl $tick, %eax
        movw %ax, 0x80100
        movw $8, 0x80102
        movw $0x8e00, 0x80104
        shrl $16, %eax
        movw %ax, 0x80106
        lidt idtr
        # Interrupt controllers: vectors from 32 and 40 on, nothing but the timer.
        mov $0x11, %al
        out %al, $0x20
        out %al, $0xa0
        mov $0x20, %al
        out %al, $0x21
        mov $0x28, %al
        out %al, $0xa1
        mov $4, %al
        out %al, $0x21
        mov $2, %al
        out %al, $0xa1
        mov $1, %al
        out %al, $0x21
        out %al, $0xa1
        mov $0xfe, %al
        out %al, $0x21
        mov $0xff, %al
        out %al, $0xa1
        # Timer: 1193182 / 11932 = 100 a second.
        mov $0x34, %al
        out %al, $0x43
        mov $(11932 & 255), %al
        out %al, $0x40
        mov $(11932 >> 8), %al
        out %al, $0x40
        mov $1, %edx
turn:   mov first, %edi
next:   cli
        cmpl $0, due
        jne work
        sti                     # takes effect after hlt: no tick is slept through
        hlt
        jmp next
work:   decl due
        sti
        mov $1024, %ecx
        mov %edx, %eax
        rep stosl
        incl done
        cmp last, %edi
        jb next
        inc %edx
        jmp turn
tick:   push %eax
        mov owed, %eax
        add %eax, due
        mov $0x20, %al
        out %al, $0x20
        pop %eax
        iret
        .align 8
gdt:    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdtr:   .word 23
        .long gdt
idtr:   .word 0x107
        .long 0x80000
end:
