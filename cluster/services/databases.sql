-- The databases of a cluster, and the one role that may open them; its password comes from the file PASSWORD_FILE.
\set password `cat "$PASSWORD_FILE"`
CREATE ROLE hdml LOGIN PASSWORD :'password';
CREATE DATABASE ledger OWNER hdml;
CREATE DATABASE mlflow OWNER hdml;
CREATE DATABASE mlflow_auth OWNER hdml;
REVOKE CONNECT ON DATABASE ledger, mlflow, mlflow_auth FROM PUBLIC;
