/* Arithmetic that takes care of the verifier: it follows every way through the code that the values it knows leave open, so
 * a comparison before a loop costs as much as the loop.
 */
/* Comparisons without jumps. In code that leads into a loop, each jump would have the verifier walk that loop once more;
 * the asm keeps LLVM from making jumps of them. Numbers below 2^63 only.
 */
static __always_inline u32 is_below(u64 a, u64 b)
{
	u64 difference = a - b;

	asm volatile("" : "+r"(difference));
	return difference >> 63;
}

static __always_inline u32 is_any(u64 word)
{
	word |= -word;
	asm volatile("" : "+r"(word));
	return word >> 63;
}

/* LLVM's BPF backend crashes on __builtin_ctzll. */
static __always_inline u32 lowest_bit(u64 word)
{
	word &= -word;
	return is_any(word & 0xaaaaaaaaaaaaaaaaULL) | is_any(word & 0xccccccccccccccccULL) << 1 |
	       is_any(word & 0xf0f0f0f0f0f0f0f0ULL) << 2 | is_any(word & 0xff00ff00ff00ff00ULL) << 3 |
	       is_any(word & 0xffff0000ffff0000ULL) << 4 | is_any(word & 0xffffffff00000000ULL) << 5;
}

static __always_inline u32 is_equal(u64 a, u64 b)
{
	return is_any(a ^ b) ^ 1;
}

static __always_inline u32 choose(u32 which, u32 one, u32 other)
{
	return other ^ ((one ^ other) & -which);
}

/* Makes the verifier forget a number by way of one that it does not know: what follows is then walked once for all values. */
static __always_inline u32 number_blur(u32 number, u32 unknown)
{
	number ^= unknown;
	asm volatile("" : "+r"(number));
	return number ^ unknown;
}
