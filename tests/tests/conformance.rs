//! Every storage does what a storage must.

mod memory {
    use durable_core::conformance::Subject;
    use durable_tests::{Backend, InMemory, Memory};

    struct Tested(InMemory);
    impl Subject for Tested {
        type Storage = Memory;
        async fn new() -> Self {
            Self(InMemory::new().await)
        }
        async fn open(&self) -> Memory {
            self.0.storage().await
        }
    }
    durable_core::conformance!(Tested);
}

mod sqlite {
    use durable_core::conformance::Subject;
    use durable_tests::{Backend, Sqlite, SqliteFile};

    struct Tested(SqliteFile);
    impl Subject for Tested {
        type Storage = Sqlite;
        async fn new() -> Self {
            Self(SqliteFile::new().await)
        }
        async fn open(&self) -> Sqlite {
            self.0.storage().await
        }
    }
    durable_core::conformance!(Tested);
}

mod postgres {
    use durable_core::conformance::Subject;
    use durable_tests::{Backend, Postgres, PostgresSchema};

    struct Tested(PostgresSchema);
    impl Subject for Tested {
        type Storage = Postgres;
        async fn new() -> Self {
            Self(PostgresSchema::new().await)
        }
        async fn open(&self) -> Postgres {
            self.0.storage().await
        }
        fn missing() -> Option<String> {
            PostgresSchema::address().err()
        }
    }
    durable_core::conformance!(Tested);
}

mod mssql {
    use durable_core::conformance::Subject;
    use durable_tests::{Backend, Mssql, MssqlSchema};

    struct Tested(MssqlSchema);
    impl Subject for Tested {
        type Storage = Mssql;
        async fn new() -> Self {
            Self(MssqlSchema::new().await)
        }
        async fn open(&self) -> Mssql {
            self.0.storage().await
        }
        fn missing() -> Option<String> {
            MssqlSchema::missing()
        }
    }
    durable_core::conformance!(Tested);
}
