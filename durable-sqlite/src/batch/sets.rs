use crate::cells::{Cell, Rows};
use crate::script::Arg;

/// Rows for one kind of operation, in at most two sets: those whose head is that of the first row travel without it,
/// since most of what a batch costs SQLite is taking its rows apart; the others have it behind their other cells.
pub(super) struct Sets<const N: usize> {
    names: [&'static str; N],
    shared: Option<(Vec<Arg>, Set)>,
    others: Set,
    /// Where the head begins in the rows of the others.
    offset: usize,
}

#[derive(Default)]
struct Set {
    at: Vec<usize>,
    rows: Rows,
}

/// Rows whose heads are read in the same way. `j` is a row, and so is `h` where the head stands beside them.
pub(super) struct Headed {
    /// The places of their operations in the batch.
    pub(super) at: Vec<usize>,
    pub(super) rows: Arg,
    head: Option<Vec<Arg>>,
    names: Vec<&'static str>,
    offset: usize,
}

impl<const N: usize> Sets<N> {
    /// Rows of so many cells, and a head with these names.
    pub(super) fn new(cells: usize, names: [&'static str; N]) -> Self {
        Self { names, shared: None, others: Set::default(), offset: cells }
    }

    pub(super) fn push<'c>(&mut self, at: usize, cells: impl IntoIterator<Item = Cell<'c>>, head: [Cell<'c>; N]) {
        let (known, set) = self.shared.get_or_insert_with(|| (head.iter().map(Cell::arg).collect(), Set::default()));
        if known.iter().zip(&head).all(|(known, cell)| cell.is(known)) {
            set.at.push(at);
            set.rows.push(cells);
        } else {
            self.others.at.push(at);
            self.others.rows.push(cells.into_iter().chain(head));
        }
    }

    pub(super) fn sets(self) -> impl Iterator<Item = Headed> {
        let Self { names, shared, others, offset } = self;
        let shared = shared.map(|(head, set)| (Some(head), set));
        let others = (!others.at.is_empty()).then_some((None, others));
        shared.into_iter().chain(others).map(move |(head, Set { at, rows })| Headed {
            at,
            rows: rows.arg(),
            head,
            names: names.to_vec(),
            offset,
        })
    }
}

impl Headed {
    /// What stands in a `FROM`, with the arguments that it takes.
    pub(super) fn from(&self) -> (String, Vec<Arg>) {
        match &self.head {
            None => ("jsonb_each(?) j".to_owned(), vec![self.rows.clone()]),
            Some(head) => {
                let names: Vec<String> = self.names.iter().map(|name| format!("? AS {name}")).collect();
                let from = format!("(SELECT {}) h CROSS JOIN jsonb_each(?) j", names.join(", "));
                (from, head.iter().chain([&self.rows]).cloned().collect())
            }
        }
    }

    /// A cell of the head, beside [`from`](Self::from).
    pub(super) fn cell(&self, name: &str) -> String {
        match &self.head {
            Some(_) => format!("h.{name}"),
            None => self.in_row(name),
        }
    }

    /// A cell of the head where only the rows stand in the `FROM`, with the argument that it takes.
    pub(super) fn bound(&self, name: &str) -> (String, Option<Arg>) {
        match &self.head {
            Some(head) => ("?".to_owned(), head.get(self.nth(name)).cloned()),
            None => (self.in_row(name), None),
        }
    }

    fn in_row(&self, name: &str) -> String {
        format!("j.value->>{}", self.offset + self.nth(name))
    }

    fn nth(&self, name: &str) -> usize {
        self.names.iter().position(|known| *known == name).unwrap_or_default()
    }
}
