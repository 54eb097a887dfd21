/// Numbers from a seed: splitmix64.
#[derive(Clone, Debug)]
pub struct Seed(u64);

impl Seed {
    /// Different seeds, different numbers, however near the seeds are.
    pub fn new(seed: u64) -> Self {
        let mut it = Self(seed ^ 0x5851_f42d_4c95_7f2d);
        it.number();
        it
    }

    /// Numbers of their own, so that more draws here change nothing there.
    pub fn fork(&mut self) -> Self {
        Self(self.number())
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `end`, which is above 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// One of `from..=to`.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    /// True so many times in a thousand.
    pub fn permille(&mut self, times: u64) -> bool {
        self.below(1000) < times
    }

    /// One of these.
    pub fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }

    /// A time in milliseconds: mostly short, sometimes up to `longest`.
    pub fn ms(&mut self, longest: u64) -> u64 {
        let most = match self.below(10) {
            0..5 => longest.min(50),
            5..8 => longest.min(2_000),
            _ => longest,
        };
        self.between(0, most)
    }
}
