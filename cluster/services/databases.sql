-- The databases of a cluster, and the one role that may open them; its password comes from the file PASSWORD_FILE.
-- May be run again, by who may make roles and databases: what is there stays, and the file's password counts.
-- A statement that fails must not be logged with the password in it.
SET log_min_error_statement = panic;
\set ON_ERROR_STOP on
\set password `cat "$PASSWORD_FILE"`
SELECT :'password' = '' AS lacks \gset
\if :lacks
    \warn the password of the role hdml can not be read: PASSWORD_FILE must name its file
    SELECT 1 / 0;
\endif
SELECT 'CREATE ROLE hdml LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'hdml') \gexec
ALTER ROLE hdml PASSWORD :'password';
GRANT hdml TO CURRENT_USER;
SELECT format('CREATE DATABASE %I OWNER hdml', name) FROM unnest(ARRAY['ledger', 'mlflow', 'mlflow_auth']) AS name
    WHERE name NOT IN (SELECT datname FROM pg_database) \gexec
REVOKE CONNECT ON DATABASE ledger, mlflow, mlflow_auth FROM PUBLIC;
